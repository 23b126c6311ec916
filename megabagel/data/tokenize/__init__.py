"""Text to token ids: Hugging Face tokenizers, sentencepiece, bytes; special tokens around texts and images."""
