"""From turns to the two strings that the model is trained on."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from axolotl.utils.chat_templates import extract_chat_template_args, get_chat_template

from .options import ConversationOptions
from .rows import Example, Turn
from .tokens import special_tokens

Tools = list[dict[str, Any]] | None


class Renderer:
    """Renders examples with the chat template that the entry, else the config, chooses."""

    def __init__(
        self, cfg: Mapping[str, Any], options: ConversationOptions, tokenizer: Any
    ) -> None:
        self._tokenizer = tokenizer
        self._kwargs = cfg.get("chat_template_kwargs") or {}
        self._choice = extract_chat_template_args(cfg=cfg, ds_cfg=options.model_dump())
        self._special = tuple(special_tokens(tokenizer).values())
        self._last: tuple[tuple[list[Turn], Tools], str] | None = None

    @cached_property
    def _template(self) -> str:
        choice, jinja = self._choice
        return get_chat_template(choice, jinja_template=jinja, tokenizer=self._tokenizer)

    def _apply(self, turns: list[Turn], tools: Tools, **kwargs: Any) -> str:
        # Without tools the argument is left out: a config's `chat_template_kwargs` may name some.
        given = {"tools": tools} if tools else {}
        return self._tokenizer.apply_chat_template(
            turns,
            chat_template=self._template,
            tokenize=False,
            **{**self._kwargs, **given, **kwargs},
        )

    def prompt(self, turns: list[Turn], tools: Tools = None) -> str:
        """The prompt up to and with the generation prompt."""
        # The responses of one row follow each other and share their prompt.
        if self._last is None or self._last[0] != (turns, tools):
            self._last = (turns, tools), self._apply(turns, tools, add_generation_prompt=True)
        return self._last[1]

    def __call__(self, example: Example) -> tuple[str, str]:
        """(prompt, completion): together the template's rendering of the conversation.

        White space that the template puts after the special token at the end of the turn is cut:
        generation ends with that token.

        Raises:
            ValueError: if the template does not render the completion's text.
        """
        prompt = self.prompt(example.prompt, example.tools)
        whole = self._apply([*example.prompt, example.completion], example.tools)
        if whole.startswith(prompt):
            completion = whole[len(prompt) :]
        else:
            # Some templates open a reasoning block in the generation prompt that they leave out
            # of a finished turn. Keep the prompt as in serving, and go on from the text.
            text = example.completion["content"].strip()
            start = whole.rfind(text)
            if start < 0 or example.completion.get("tool_calls"):
                raise ValueError(
                    "the chat template renders neither the generation prompt before the last turn "
                    f"nor its text alone and as it stands: {text[:60]!r}"
                )
            completion = whole[start:]
        stripped = completion.rstrip()
        return prompt, stripped if stripped.endswith(self._special) else completion
