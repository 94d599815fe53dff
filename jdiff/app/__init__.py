"""A page in the browser, and an HTTP API, around a pipeline (gradio, the extra `app`)."""
