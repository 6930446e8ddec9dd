"""The HTTP service, with the request and response formats ("dialects") of existing rerank APIs.

config     settings from options, environment variables and a TOML file
wire       request and response types, and the common types Ask (request) and Answer (result)
dialects   the table DIALECTS: one row for each API, with its paths, decoder, encoder and error format
auth       API keys, rate limits, size limits
queue      one queue for all requests, batched by tokens
models     the models of a process, loaded on first use
service    from an Ask to an Answer: size checks, tokenisation, queue, ranking
telemetry  Prometheus metrics, JSON logs, OpenTelemetry traces
openapi    the OpenAPI document, generated from DIALECTS
http       request bodies, JSON, and the middleware around every request
app        the ASGI application
server     the uvicorn process: TLS, timeouts, graceful shutdown
"""
