"""The OpenAI-compatible server: requests come in on an asyncio loop, one thread owns model, cache and engine.

server.py     the process: uvicorn, signals     listening.py  address or UNIX socket, TLS
app.py        what is where                     gate.py       what every request goes through: keys, counts
asked.py      a body read                       protocol.py   what may be asked   openapi.py  its description
routes/       the routes beside chat and completions
service.py    a request admitted, prepared, answered in time
limits.py     what one server takes on, and how a body is read within it
fair_queue.py whose turn it is                  connections.py  how many, how long
account.py    what a request came to            logs.py       what is written down   metrics.py  what is counted
worker.py     the engine's thread
sessions.py   conversations kept in a directory, found again by the prompt's prefix
answering.py  how an answer is sent             replies.py    what it looks like     tools.py    calls in it
errors.py     how one is refused                page/         the chat at /
"""
