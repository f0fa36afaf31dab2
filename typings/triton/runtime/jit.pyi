from typing import Any

class CompiledKernel:
    asm: dict[str, bytes]
    metadata: Any

class JITFunction:
    fn: Any
    def warmup(self, *args: object, grid: tuple[int, ...], **kwargs: object) -> CompiledKernel: ...
    def __getitem__(self, grid: tuple[int, ...]) -> Any: ...
