"""Pictures from prompts. Training samples images through its own forward path; nothing else is loaded for it."""
