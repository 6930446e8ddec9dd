"""The server process: uvicorn with TLS, timeouts for slow clients and graceful shutdown."""

from __future__ import annotations

import asyncio
import math
import signal
import ssl
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from turborank.errors import InputError
from turborank.serve import telemetry
from turborank.serve.config import Settings
from turborank.serve.service import Service


def check_open_door(settings: Settings, service: Service) -> str:
    """The log text about API keys. Raises InputError when other machines can connect and no key is required."""
    if service.ring.required:
        return "API keys are required"
    if settings.loopback:
        return f"no API keys: only this machine can connect, and all its users may send requests ({settings.host})"
    raise InputError(
        f"expected API keys for a server that others can reach, got none for host {settings.host}",
        hint="make one with `turborank keys new NAME` and pass --keys FILE, or listen on 127.0.0.1",
    )


def protocol(header_timeout: float, answer_timeout: float) -> type[H11Protocol]:
    """The HTTP/1.1 protocol of uvicorn with two timeouts, in seconds, against slow clients.

    The connection is closed when a request's headers are not complete after ``header_timeout``, and when the client
    reads nothing of a response for ``answer_timeout``. Clients that read slowly are not disconnected.
    """

    class Protocol(H11Protocol):
        _patience: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            if self._patience is None and (self.cycle is None or self.cycle.response_complete):
                self._wait()  # the first bytes of another request on a kept connection
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()

        def on_response_complete(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
            self._watch(None)
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            if self._reading is not None:
                self._reading.cancel()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._patience = self.loop.call_later(header_timeout, self._give_up)

        def _stop(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _give_up(self) -> None:
            self._patience = None
            if self.transport is not None and not self.transport.is_closing():
                self.transport.close()

        def _watch(self, before: int | None) -> None:
            """Abort the connection if the write buffer has not shrunk since ``answer_timeout`` seconds."""
            unread = self.transport.get_write_buffer_size()
            if before is not None and unread >= before:
                self.transport.abort()  # close() would wait until the client has read the buffer
            elif unread:
                self._reading = self.loop.call_later(answer_timeout, self._watch, unread)

    return Protocol


def check_certificate(settings: Settings) -> None:
    """Raise InputError unless the certificate and its key can be read and match."""
    if settings.tls_certificate:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")  # "": never prompts
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"expected a PEM certificate at {settings.tls_certificate} and its key at {settings.tls_key}, "
                f"got: {error}",
                hint="tls_certificate and tls_key name the files; the key must have no passphrase",
            ) from None


class Server(uvicorn.Server):
    """uvicorn with graceful shutdown: on SIGTERM /ready answers 503, and after ``drain`` seconds the socket closes.

    Requests in progress are answered. A second signal stops the server at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._close_at: float | None = None
        self.failure: BaseException | None = None
        self.interrupted = False  # by Ctrl-C

    def fail(self, error: BaseException) -> None:
        """Stop the server because the default model cannot be loaded."""
        self.failure = error
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler: start draining; stop at once on the second signal."""
        self.interrupted |= sig == signal.SIGINT
        if self._close_at is not None:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._close_at = time.monotonic() + self._service.settings.drain
        telemetry.event("draining", {"signal": signal.Signals(sig).name, "seconds": self._service.settings.drain})

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; stops the server when draining ends."""
        if self._close_at is not None and time.monotonic() >= self._close_at:
            self._service.closing = self.should_exit = True
        return await super().on_tick(counter)


def make(settings: Settings, build: Callable[..., ASGIApp]) -> Server:
    """A server ready to run. ``build`` is :func:`turborank.serve.app.build`.

    Raises InputError for invalid settings before a model is loaded.
    """
    service = Service(settings)
    try:
        doors = check_open_door(settings, service)
        check_certificate(settings)
        server = Server(uvicorn.Config(lambda scope: None, log_config=None), service)
        server.config = uvicorn.Config(
            build(service, on_failure=server.fail),
            host=settings.host,
            port=settings.port,
            http=protocol(settings.header_timeout, settings.answer_timeout),
            ws="none",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            root_path=settings.prefix,
            timeout_keep_alive=settings.keep_alive,
            timeout_graceful_shutdown=math.ceil(settings.timeout),
            limit_concurrency=settings.max_connections + 1,  # uvicorn refuses the connection that reaches this number
            ssl_certfile=settings.tls_certificate or None,
            ssl_keyfile=settings.tls_key or None,
        )
    except BaseException:
        service.close()
        raise
    names = [model.name for model in service.models.all]
    telemetry.event("starting", {"models": names, "host": settings.host, "port": settings.port, "keys": doors})
    return server


def run(settings: Settings, build: Callable[..., ASGIApp]) -> None:
    """Serve until a signal; see :func:`make`.

    Raises the error when the default model cannot be loaded, and KeyboardInterrupt on SIGINT.
    """
    telemetry.set_up(settings.log_level)
    server = make(settings, build)
    server.run()
    if server.failure is not None:
        raise server.failure
    if server.interrupted:
        raise KeyboardInterrupt
