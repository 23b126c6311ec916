"""The published BAGEL folder of safetensors, in and out (bagel-reference sections 2 and 3)."""
