"""The OpenAI-compatible server: requests come in on an asyncio loop, one thread owns model, cache and engine.

app.py       routes            protocol.py  what may be asked      replies.py  what is answered
worker.py    the engine's thread, and a request's way through it   metrics.py  what is counted
"""
