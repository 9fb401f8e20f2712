"""The routes. Each is a few lines: read, parse, generate, answer; the work is in the modules they name.

The application knows neither processes nor sockets; `services` brings what it needs. No documentation routes, no files,
no CORS: a browser page of another origin cannot use this server (reliability rules R29, R30).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

import engine
from engine.core.clock import wall_s
from engine.core.plan import TokenLogprobs
from engine.serve import schema
from engine.serve.body import read_json
from engine.serve.engine_client import EngineFailed
from engine.serve.errors import ApiError, shown
from engine.serve.generation import ClientGone, Generation, Prompt, Tools
from engine.serve.guard import FAULT, Guard, Receive, Send, error_headers
from engine.serve.ids import Limits, take_space, take_text_ids
from engine.serve.logprobs_json import LogprobsJson
from engine.serve.openai_json import Shape, error_event
from engine.serve.services import Services
from engine.serve.text_pool import TextPool

MAX_TOKENIZE_TOKENS = 1 << 20


def json_response(value: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


class _Model:
    """What is there once the engine is ready; asking earlier is a 503."""

    def __init__(self, services: Services) -> None:
        if services.state not in ("ready", "stalled") or services.tools is None:
            raise ApiError(503, f"the engine is not ready ({services.state}); try again a little later",
                           code="not_ready")  # fmt: skip
        assert services.limits is not None and services.text is not None
        self.limits: Limits = services.limits
        self.tools: Tools = services.tools
        self.text: TextPool = services.text


async def _encode_all(model: _Model, ask: schema.Ask) -> list[Prompt]:
    """Every prompt as ids of the engine."""
    from engine.tokenization.stream import whole_characters

    length = model.limits.max_model_len
    if ask.messages is not None:
        if not model.text.facts.has_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", "messages")
        done = await model.text.render(ask.messages, max_tokens=length)
        return [Prompt(done.tokens, done.base_count)]
    prompts = []
    for prompt in ask.prompts:
        if isinstance(prompt, str):
            done = await model.text.encode(prompt, add_special_tokens=True, max_tokens=length)
            prompts.append(Prompt(done.tokens, done.base_count, prompt if ask.echo else None))
            continue
        base, lengths = ask.token_space == "base", model.tools.base_lengths
        text = await model.text.decode(prompt, base=base) if ask.echo else None
        base_tokens = sum(lengths[token] for token in prompt) if lengths and not base else len(prompt)
        ids = (await model.text.convert(prompt)).tokens if base else prompt
        echo = None if text is None else whole_characters(model.tools.tokenizer.table, ids, text)
        prompts.append(Prompt(ids, base_tokens, echo))
    return prompts


def _output_limits(ask: schema.Ask, prompts: list[Prompt], limits: Limits) -> list[int]:
    """Output tokens of each prompt: what was asked for if it fits (else 400), or what is left of the context."""
    param = "messages" if ask.chat else "prompt"
    allowed = []
    for prompt, _, _ in prompts:
        left = limits.max_model_len - len(prompt)
        if not prompt:
            raise ApiError(400, f"{param} has no tokens; at least one is needed", param, "invalid_value")
        if left < 1:
            raise ApiError(400, f"{param} has {len(prompt)} tokens and the model's context is {limits.max_model_len}, "
                                "so no token can follow", param, "context_length_exceeded")  # fmt: skip
        wanted = ask.params.max_tokens
        if wanted is not None and wanted > left and ask.max_tokens_given:
            raise ApiError(400, f"max_tokens={wanted} and {len(prompt)} prompt tokens exceed the model's context of "
                                f"{limits.max_model_len} tokens; at most {left} can follow", "max_tokens",
                           "context_length_exceeded")  # fmt: skip
        base = ask.max_base_tokens or left  # a token stands for one base token or more
        allowed.append(min(wanted or left, left, base))
    if ask.params.min_tokens > min(allowed):
        raise ApiError(400, f"min_tokens={ask.params.min_tokens} is above the {min(allowed)} tokens that can follow",
                       "min_tokens", "invalid_value")  # fmt: skip
    return allowed


async def _generate(request: Request, services: Services, parse: Callable[..., schema.Ask]) -> Response:
    """Both generating routes."""
    body = await read_json(request, services)
    model = _Model(services)
    accepted_s = model.tools.clock.now_s()
    ask = parse(body, model.limits)
    samples = ask.params.n * max(1, len(ask.prompts))
    if services.reserved_samples + samples > services.config.max_waiting:
        raise ApiError(503, f"{services.reserved_samples} samples are here and at most {services.config.max_waiting} "
                            "may be; try again a little later", code="overloaded")  # fmt: skip
    seat = _Seat(services, samples)
    try:
        prompts = await _encode_all(model, ask)
        limits = _output_limits(ask, prompts, model.limits)
        generation = Generation(model.tools, prompts, ask.params, max_tokens=limits, priority=ask.priority,
                                accepted_s=accepted_s, max_base_tokens=ask.max_base_tokens,
                                tenant=request.scope.get("tenant", b""))
        told = None if ask.params.logprobs is None else LogprobsJson(model.tools.tokenizer.table, ask.chat)
        shape = Shape(ask.chat, generation.name, int(wall_s()), ask.model, ask.include_usage, told)
        running = _Running(generation, seat, request)
        try:
            generation.start()
            await generation.accepted()
            if ask.stream:
                seat.handed_over = True
                return EventStream(running, shape, services.config.stall_abort_s)
            return await _whole(generation, shape)
        except BaseException:
            running.close()
            raise
        finally:
            if not ask.stream:
                running.close()
    finally:
        if not seat.handed_over:
            seat.leave()


class _Seat:
    """Counts a request in `services` until it has ended, however it ends."""

    def __init__(self, services: Services, samples: int) -> None:
        self._services = services
        self._samples = samples
        self.handed_over = False
        services.generating += 1
        services.reserved_samples += samples

    def leave(self) -> None:
        """Idempotent."""
        self._services.generating -= bool(self._samples)
        self._services.reserved_samples -= self._samples
        self._samples = 0


class _Running:
    """A generation and the watch for its client's leaving; closing it ends both."""

    def __init__(self, generation: Generation, seat: _Seat, request: Request) -> None:
        self.generation = generation
        self.seat = seat
        self._watch = asyncio.get_running_loop().create_task(self._wait_for_leaving(request.receive))

    async def _wait_for_leaving(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.generation.mailbox.leave()

    def close(self, outcome: str = "abort") -> None:
        """Idempotent."""
        self._watch.cancel()
        self.generation.close(outcome)


async def _whole(generation: Generation, shape: Shape) -> Response:
    """Wait for every sample and answer at once."""
    parts = [[echo] for echo in generation.echoes]
    reasons = ["stop"] * len(parts)
    logprobs: list[list[TokenLogprobs]] = [[] for _ in parts]
    offsets: list[list[int]] = [[] for _ in parts]
    while not generation.done:
        for delta in await generation.next():
            parts[delta.index].append(delta.text)
            reasons[delta.index] = delta.finish_reason or reasons[delta.index]
            logprobs[delta.index] += delta.logprobs
            offsets[delta.index] += delta.offsets
    texts = ["".join(part) for part in parts]
    body = shape.whole(list(zip(texts, reasons, logprobs, offsets, strict=True)), generation.usage())
    return Response(body, media_type="application/json")


class EventStream(Response):
    """A streamed answer: server-sent events, one write a step, each awaited: a slow reader slows only itself."""

    def __init__(self, running: _Running, shape: Shape, stall_s: float) -> None:
        super().__init__()
        self._running = running
        self._shape = shape
        self._stall_s = stall_s

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Write until done, or until the client leaves, stalls, or the engine fails."""
        generation, shape = self._running.generation, self._shape
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        outcome = "abort"

        async def write(data: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(self._stall_s):
                    await send({"type": "http.response.body", "body": data, "more_body": more})
            except TimeoutError:
                scope.get("tessera.drop", lambda: None)()
                raise ClientGone from None

        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            if opening := shape.opening(generation.echoes):
                await write(opening)
            while not generation.done:
                if frames := b"".join(shape.delta(delta) for delta in await generation.next()):
                    await write(frames)
            await write(shape.closing(generation.usage()), more=False)
        except ApiError as error:
            outcome = "error"
            await write(error_event(error), more=False)
        except ClientGone:
            pass
        except Exception:
            outcome = "error"
            await write(error_event(ApiError(500, FAULT)), more=False)
            raise
        finally:
            self._running.close(outcome)
            self._running.seat.leave()


def _add_generation(app: FastAPI, services: Services) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _generate(request, services, schema.parse_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _generate(request, services, schema.parse_chat)


def _add_models(app: FastAPI, services: Services) -> None:
    def card(name: str, model: _Model) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": services.created_s, "owned_by": "tessera",
                "max_model_len": model.limits.max_model_len, **services.card_extra}  # fmt: skip

    @app.get("/v1/models")
    async def models() -> Response:
        model = _Model(services)
        return json_response({"object": "list", "data": [card(name, model) for name in model.limits.model_names]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        model = _Model(services)
        return json_response(card(schema.take_model({"model": name}, model.limits), model))


def _add_text(app: FastAPI, services: Services) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        fields = await read_json(request, services)
        model = _Model(services)
        schema.take_model(fields, model.limits)
        length = model.limits.max_model_len
        special = fields.pop("add_special_tokens", True)
        prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
        if fields or not isinstance(special, bool) or (prompt is None) == (messages is None):
            raise ApiError(400, "the fields are model, add_special_tokens (a boolean) and one of prompt and messages",
                           next(iter(fields), "prompt"))  # fmt: skip
        both = model.limits.base_vocab_size is not None
        if messages is not None:
            done = await model.text.render(schema.take_messages(messages), max_tokens=length, both=both)
        elif isinstance(prompt, str):
            done = await model.text.encode(prompt, add_special_tokens=special, max_tokens=length, both=both)
        else:
            raise ApiError(400, "prompt must be one text", "prompt", "invalid_value")
        answer: dict[str, Any] = {"count": done.count, "max_model_len": length, "tokens": done.tokens}
        if both:
            answer |= {"base_count": done.base_count, "base_tokens": done.base_tokens}
        return json_response(answer)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        fields = await read_json(request, services)
        model = _Model(services)
        schema.take_model(fields, model.limits)
        tokens = fields.pop("tokens", None)
        space = take_space(fields, model.limits, ["tokens"])
        if fields or not isinstance(tokens, list):
            raise ApiError(400, "the fields are model, token_space and tokens, a list of token ids",
                           next(iter(fields), "tokens"))  # fmt: skip
        ids = take_text_ids(tokens, model.limits, "tokens", space)
        return json_response({"prompt": await model.text.decode(ids, base=space == "base")})


def _add_operations(app: FastAPI, services: Services, drain: Callable[[], None]) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Alive: the engine answers. Not a promise to take requests; /ready is."""
        state = services.state
        return json_response({"status": "ok" if state == "ready" else state}, 200 if state == "ready" else 503)

    @app.get("/ready")
    async def ready() -> Response:
        state = "draining" if services.draining else services.state
        return json_response({"status": state}, 200 if state == "ready" else 503)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": engine.__version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        services.metrics.loop_lag_s.set(services.loop_lag_s)
        services.metrics.take_dropped_lines(services.dropped_lines())
        return Response(services.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if services.admin_keys:

        @app.post("/admin/drain")
        async def admin_drain() -> Response:
            drain()
            return json_response({"status": "draining"})

        @app.post("/admin/kv-limit")
        async def admin_kv_limit(request: Request) -> Response:
            return json_response(await _set_kv_limit(await read_json(request, services), services))


async def _set_kv_limit(fields: dict[str, Any], services: Services) -> dict[str, int]:
    """{"groups": n} or {"bytes": n}: how much KV memory may exist from now on. Bytes are rounded down to groups."""
    _Model(services)
    assert services.engine is not None and services.engine.facts is not None
    facts = services.engine.facts
    group_bytes = facts.page_bytes * facts.pages_per_group
    name, value = next(iter(fields.items()), ("groups", None))
    if len(fields) != 1 or name not in ("groups", "bytes"):
        raise ApiError(400, "the body is one field: groups or bytes", name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 50:
        raise ApiError(400, f"{name}={shown(value)} is not a whole number above 0", name)
    groups = min(value if name == "groups" else value // group_bytes, 1 << 40)
    try:
        answer = await services.engine.set_kv_limit(groups)
    except EngineFailed as error:
        raise ApiError(503, f"{error}; try again later") from None
    if answer.error is not None:
        raise ApiError(answer.status, f"{answer.error} (a group is {group_bytes} bytes)", name)
    return {"groups": groups, "bytes": groups * group_bytes, "in_use_groups": answer.in_use_groups}


async def _answer_exception(request: Request, error: Exception) -> Response:
    """Whatever a route raised, as OpenAI's error object. A fault of ours goes on to the guard, which counts it."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)  # nobody reads it; it is a count
    found = error if isinstance(error, ApiError) else ApiError(500, FAULT)
    if isinstance(error, HTTPException):
        path = request.url.path[:80]
        found = ApiError(error.status_code, "the request was refused")
        if error.status_code == 404:
            found = ApiError(404, f"there is no route {path}")
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            found = ApiError(405, f"{request.method[:20]} is not allowed on {path}; allowed: {allowed}",
                             headers=((b"allow", allowed.encode()),))  # fmt: skip
    response = Response(found.encoded(), found.status)
    response.raw_headers += error_headers(found)
    return response


def build_app(services: Services, drain: Callable[[], None] = lambda: None) -> Guard:
    """The whole application, guarded. drain: what SIGTERM does, for the admin route."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_generation(app, services)
    _add_models(app, services)
    _add_text(app, services)
    _add_operations(app, services, drain)

    for kind in (HTTPException, ApiError, ClientGone, Exception):
        app.add_exception_handler(kind, _answer_exception)
    return Guard(app, services)
