"""Tokenizers (Hugging Face, sentencepiece, bytes), and the special tokens around texts and images."""
