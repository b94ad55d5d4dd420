"""The OpenAI-compatible server: requests come in on an asyncio loop, one thread owns model, cache and engine.

server.py     the process: socket, uvicorn, signals
app.py        routes                      protocol.py  what may be asked     openapi.py  its description
service.py    a request admitted, prepared, answered in time
limits.py     what one server takes on, and how a body is read within it
turns.py      whose turn it is       connections.py  how many, how long       logs.py  what is written down
worker.py     the engine's thread         metrics.py   what is counted
sessions.py   conversations kept in a directory, found again by the prompt's prefix
answering.py  how an answer is sent       replies.py   what it looks like    tools.py    calls in it
errors.py     how one is refused          page/        the chat at /
"""
