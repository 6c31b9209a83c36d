"""OpenAI's HTTP API over a ServingLoop, on starlette and uvicorn (extra `serve`)."""
