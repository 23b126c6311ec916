"""What this machine has for training, what it lacks and what is wrong with it: `megabagel doctor`."""
