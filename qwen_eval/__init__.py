"""qwen_eval: quality, speed and memory of Qwen models, in one table with error bars."""

__version__ = "0.1.0"
