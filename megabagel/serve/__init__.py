"""HTTP server: the OpenAI API over one loaded model, and a web page.

Two threads share the work. The main thread owns the model and runs its engine (`worker`); a second thread runs the
event loop with the HTTP side (`app`, `chat`, `images`). Requests go over as `jobs.Job`, results come back as
`events`. starlette and uvicorn are the extra `serve`; only `app`, `chat`, `images`, `guard`, `client` and `server`
import them.
"""
