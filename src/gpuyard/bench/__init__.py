"""Load on an OpenAI-compatible address, and a ledger that says of every request how it ended.

Pure: what is asked (`schedule`), how an answer is read (`sse`, `answers`), how it is judged and counted (`ledger`,
`measures`). The rim is `client`.
"""
