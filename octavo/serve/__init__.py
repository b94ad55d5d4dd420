"""The OpenAI-compatible server: requests come in on an asyncio loop, one thread owns model, cache and engine.

server.py      the process: uvicorn, signals        listening.py    address or UNIX socket, TLS
app.py         all routes together                  access.py       what every request goes through: keys, counts
routes/        a file or folder for each            openapi.py      their description
requests/      what may be asked, field by field, and how a body is read within bounds (body.py);
               requests/generate.py is the one value that all of them become
prompts.py     what the engine is given of it       calls/          calls of functions, written and read in a text
service.py     a request admitted, prepared, answered in time
output/        what is sent: choices as one value, log-probabilities, response bodies, streams
errors.py      how a request is refused
limits.py      what one server takes on             connections.py  how many, how long
fair_queue.py  whose turn it is                     worker.py       the engine's thread
accounting.py  what a request came to               metrics.py      what is counted     logs.py  what is written down
sessions.py    conversations kept in a directory, found again by the prompt's prefix
response_store.py   what /v1/responses has answered, for requests that go on with it
page/          the chat at /
"""
