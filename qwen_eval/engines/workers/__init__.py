"""One run spread over several engines, each in a process of its own on its own GPUs, placed by Ray (docs/scale.md)."""
