"""The OpenAI-compatible server: requests come in on an asyncio loop, one thread owns model, cache and engine.

server.py      the process: uvicorn, signals        listening.py    address or UNIX socket, TLS
app.py         all routes together                  gate.py         what every request goes through: keys, counts
routes/        a file or folder for each            openapi.py      their description
bodies.py      a body is read                       requests/       what may be asked, field by field
asked.py       a request as one value               prompts.py      what the model is given of it
answers.py     its answers as one value             replies.py      how OpenAI writes them
calls/         calls of functions in a text         token_texts.py  log-probabilities and the text they belong to
service.py     a request admitted, prepared, answered in time
answering.py   how an answer is sent                errors.py       how a request is refused    events.py  bytes of both
limits.py      what one server takes on             connections.py  how many, how long
fair_queue.py  whose turn it is                     worker.py       the engine's thread
account.py     what a request came to               metrics.py      what is counted     logs.py  what is written down
sessions.py    conversations kept in a directory, found again by the prompt's prefix
store.py       what /v1/responses has answered, for requests that go on with it
page/          the chat at /
"""
