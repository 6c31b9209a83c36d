"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes: what a client needs who has no tokenizer of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from starling.engine.errors import StarlingError, shown
from starling.serving.api.api_errors import bad_field, from_engine
from starling.serving.api.fields import Fields, json_object
from starling.serving.api.messages import TEMPLATE_FIELDS, read_messages, read_template_variables
from starling.serving.http.body import read_body
from starling.serving.http.request_bodies import read_model
from starling.serving.http.request_log import request_trace
from starling.serving.http.service import Service

TOKENIZE_FIELDS = frozenset(
    {
        *("model", "prompt", "messages", "template", "add_special_tokens", "add_generation_prompt"),
        *("return_token_strs", *TEMPLATE_FIELDS),
    }
)
DETOKENIZE_FIELDS = frozenset({"model", "tokens"})


class TokenEndpoints:
    """The endpoints; each is one method, whose work is done on a worker."""

    def __init__(self, service: Service, max_body: int) -> None:
        self._service, self._max_body = service, max_body
        self._engine, self._tokenizer = service.engine, service.engine.tokenizer

    def routes(self) -> list[Route]:
        """Their paths."""
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
        ]

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: a text's or a chat's token ids."""
        return await self._answer(request, TOKENIZE_FIELDS, self._tokenized)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of token ids, special tokens by their names."""
        return await self._answer(request, DETOKENIZE_FIELDS, self._detokenized)

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info: the special tokens by their roles, and the chat template."""
        eos = self._engine.bundle.tokens.eos
        roles: dict[str, str | None] = {"bos_token": None, "pad_token": None}
        roles["eos_token"] = self._tokenizer.id_to_token(eos[0]) if eos else None
        return JSONResponse(
            roles
            | dict(self._tokenizer.special_tokens)
            | {"chat_template": self._engine.chat_templates.source(), "model_max_length": self._engine.max_seq}
        )

    async def _answer(
        self, request: Request, known: frozenset[str], task: Callable[[Fields], dict[str, Any]]
    ) -> Response:
        body, limits = await read_body(request, self._max_body), self._service.limits

        def work() -> tuple[dict[str, Any], tuple[str, ...]]:
            fields = Fields(json_object(body))
            ignored = fields.refuse_unknown(known, least=limits.least_alike)
            read_model(fields, limits)
            try:
                return task(fields), ignored
            except StarlingError as error:
                raise from_engine(error, "messages" if "messages" in fields.values else "prompt") from None

        document, ignored = await self._service.work(work)
        request_trace(request.scope).note_ignored(ignored)
        return JSONResponse(document)

    def _tokenized(self, fields: Fields) -> dict[str, Any]:
        ids = self._chat_ids(fields) if "messages" in fields.values else self._text_ids(fields)
        named = fields.get("return_token_strs", bool, False)
        return {
            "count": len(ids),
            "max_model_len": self._engine.max_seq,
            "tokens": ids,
            "token_strs": [self._tokenizer.id_to_token(token) for token in ids] if named else None,
        }

    def _text_ids(self, fields: Fields) -> list[int]:
        for name in ("template", "add_generation_prompt", *TEMPLATE_FIELDS):
            if name in fields.values:
                raise bad_field(name, f"{name} is for a chat: send it with messages, or leave it out")
        whole = fields.get("add_special_tokens", bool, True)
        return self._tokenizer.encode(fields.required("prompt", str), add_special_tokens=whole)

    def _chat_ids(self, fields: Fields) -> list[int]:
        if "prompt" in fields.values:
            raise bad_field("prompt", "prompt and messages are both given: send one of them")
        fields.only("add_special_tokens", False, why="the chat template writes all special tokens")
        return self._engine.chat_templates.encode(
            read_messages(fields),
            self._tokenizer,
            name=fields.optional("template", str),
            add_generation_prompt=fields.get("add_generation_prompt", bool, True),
            client_variables=read_template_variables(fields),
        )

    def _detokenized(self, fields: Fields) -> dict[str, Any]:
        ids, vocabulary = fields.required("tokens", list), self._engine.bundle.architecture.vocab_size
        for index, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < vocabulary:
                raise bad_field("tokens", f"tokens[{index}] is {shown(token)}: give token ids, 0 to {vocabulary - 1}")
        return {"prompt": self._tokenizer.decode(ids, skip_special_tokens=False)}
