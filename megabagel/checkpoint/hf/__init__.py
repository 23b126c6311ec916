"""The published BAGEL folder of safetensors, in and out (docs/bagel.md#published-folder)."""
