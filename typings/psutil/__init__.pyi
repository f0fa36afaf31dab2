"""What models/device.py uses of psutil."""

class _Memory:
    total: int
    available: int

def virtual_memory() -> _Memory: ...
