"""A vision model as judge of a picture, behind an OpenAI-compatible endpoint, asked as Qwen's benchmark asks."""

from __future__ import annotations

import base64
import os
from functools import cached_property
from typing import Any

from qwen_eval.core import ConfigError, EngineError

QUESTION = {
    "en": (
        "Please judge whether the image is consistent with the [Question] below, if it is consistent then reply "
        '"right", if not then reply "wrong".\n[Question]: {query}\n'
    ),
    "zh": ("请判断图片是否与下面的[问题]一致，如果一致则回复“right”，不一致则回复“wrong”。\n[问题]：{query}\n"),
}
MOST_TOKENS = 300
MAX_RETRIES = 5
TIMEOUT_S = 120.0


class VisionJudge:
    """`model` at `base_url`; the key is read from OPENAI_API_KEY and never stored."""

    def __init__(self, base_url: str, model: str | None) -> None:
        if not model:
            raise ConfigError(f"task.judge_base_url={base_url}: name its model too, task.judge_model=")
        self.base_url, self.model = base_url, model

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise EngineError("task.judge_base_url needs the package openai: pip install 'qwen_eval[api]'") from error
        key = os.environ.get("OPENAI_API_KEY", "none")
        return openai.OpenAI(base_url=self.base_url, api_key=key, max_retries=MAX_RETRIES, timeout=TIMEOUT_S)

    def reply(self, query: str, language: str, png: bytes) -> str:
        """What the judge says of a picture. EngineError where no judge answers."""
        text = QUESTION["zh" if language == "zh" else "en"].format(query=query)
        url = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=MOST_TOKENS,
                temperature=0,
            )
        except Exception as error:
            raise EngineError(f"{self.base_url}: the judge does not answer ({str(error).splitlines()[0]})") from error
        return str(answer.choices[0].message.content or "")


def says_right(reply: str) -> bool:
    """As the official script reads the judge."""
    return "right" in reply.lower()
