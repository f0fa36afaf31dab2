class runtime:
    interpret: bool
