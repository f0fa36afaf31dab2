"""What a run's requests cost: tokens as the server counts them, times the prices that the user gives.

A table of prices is a YAML file, per million tokens:

    currency: CNY
    models:
      qwen-plus: {input: 0.8, cached_input: 0.16, output: 2.0}
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_eval.core import JSON, ConfigError
from qwen_eval.engines.api.replies import Usage

MAX_TABLE_BYTES = 1 << 20
KEYS = ("input", "cached_input", "output")


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Per million tokens."""

    input: float
    output: float
    cached_input: float
    currency: str = ""

    def cost(self, usage: Usage) -> float:
        fresh = max(0, usage.prompt_tokens - usage.cached_tokens)
        parts = (fresh * self.input, usage.cached_tokens * self.cached_input, usage.completion_tokens * self.output)
        return math.fsum(parts) / 1e6


def read_prices(path: str, model: str) -> Prices:
    """The row of `model`; ConfigError in one line where there is none or it cannot be read."""
    import yaml

    try:
        file = Path(path)
        if file.stat().st_size > MAX_TABLE_BYTES:
            raise ConfigError(f"engine.prices={path}: more than {MAX_TABLE_BYTES >> 20} MiB is no table of prices")
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.prices={path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"engine.prices={path}: not a YAML file") from error
    models = table.get("models") if isinstance(table, dict) else None
    if not isinstance(models, dict) or model not in models:
        raise ConfigError(
            f"engine.prices={path}: no prices of {model}; write models: {{{model}: {{input: , output: }}}}"
        )
    return _prices(models[model], str(table.get("currency", "")), f"engine.prices={path}: {model}")


def _prices(row: JSON, currency: str, where: str) -> Prices:
    if not isinstance(row, dict) or not {"input", "output"} <= set(row) <= set(KEYS):
        raise ConfigError(f"{where}: needs input and output, may have cached_input, per million tokens")
    values: dict[str, Any] = {key: row.get(key, row["input"]) for key in KEYS}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(f"{where}: {key}={value} is no price")
    return Prices(
        currency=currency, input=values["input"], cached_input=values["cached_input"], output=values["output"]
    )


@dataclass(kw_only=True)
class Account:
    """Of one session, the check at its start included: what an interrupted session paid is not known here."""

    prices: Prices | None = None
    num_replies: int = field(default=0, init=False)
    prompt_tokens: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)
    completion_tokens: int = field(default=0, init=False)

    def add(self, usage: Usage) -> None:
        self.num_replies += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens

    @property
    def facts(self) -> dict[str, JSON]:
        usage = Usage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
        )
        found: dict[str, JSON] = {"num_replies": self.num_replies, **usage.__dict__}
        if self.prices is not None:
            found |= {"cost": round(self.prices.cost(usage), 6), "currency": self.prices.currency}
        return found
