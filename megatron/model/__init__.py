"""The Llama decoder: modules, the numbered layers they form, their loss, and weights to start from."""
