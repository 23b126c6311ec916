"""Sample images during training, through the forward path of training; no second copy of the weights."""
