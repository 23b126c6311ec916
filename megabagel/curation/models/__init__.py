"""Models behind one seam: questions in, cached and counted answers out."""
