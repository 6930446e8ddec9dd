"""The service: the library behind HTTP, in the dialects that rerank clients already speak.

config    every setting, from flags, environment and a TOML file, under one name each
wire      requests and responses as typed values, and the Ask every request becomes
dialects  DIALECTS: paths, decode, encode, error - one row each
auth      keys, rates and sizes
queue     one queue for all requests, by tokens
models    the models a process serves, loaded when first asked for
service   an Ask to an Answer
app       the ASGI application;  server  the process around it
"""
