"""A page in the browser to make pictures with a model: text, picture or class to picture, repainting, LoRAs.

    python tools/app.py runs/a                      # http://127.0.0.1:7860
    python tools/app.py stable-diffusion-v1-5 --precision bf16 --port 8000
    python tools/app.py PATH --host 0.0.0.0 --auth NAME:PASSWORD

It listens on this machine alone unless --host says otherwise. Pictures are made one job at a time, in the order in which they were
asked for; `Use via API` at the foot of the page shows how programs call the same functions. Needs the extra `app`:
pip install 'jax-jdiff[app]'.
"""

import argparse
import logging
import os
import signal
import sys
import threading

from jdiff import command


def main() -> int:
    """Parses, loads the model, serves until Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a training run's folder, or any checkpoint that tools/sample.py takes")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--auth", metavar="NAME:PASSWORD", help="ask for these before showing the page")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of the model's work (default: its own)")
    limits = parser.add_argument_group("limits of a job")
    limits.add_argument("--max-side", type=int, default=1024, help="of a picture, in pixels (default: %(default)s)")
    limits.add_argument("--max-steps", type=int, default=150, help="(default: %(default)s)")
    limits.add_argument("--max-pictures", type=int, default=4, help="(default: %(default)s)")
    limits.add_argument("--max-waiting", type=int, default=16, help="jobs in the queue (default: %(default)s)")
    return command.run("app.py", serve, parser.parse_args())


def serve(options: argparse.Namespace) -> int:
    """The work behind `main`."""
    command.check_above_zero(options, ("max_side", "max_steps", "max_pictures", "max_waiting"))
    if options.auth is not None and not all(options.auth.partition(":")):
        raise ValueError("--auth: give NAME:PASSWORD")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is up
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError("the page needs gradio: pip install 'jax-jdiff[app]'") from error

    import jdiff
    from jdiff import runtime
    from jdiff.app.page import make_page
    from jdiff.app.studio import Limits, Studio

    runtime.prepare(runtime.cpu_devices(2, least=1))  # the two rows of one guided picture
    pipe = jdiff.pipeline(options.model, precision=options.precision)
    limits = Limits(options.max_side, options.max_steps, options.max_pictures, waiting=options.max_waiting)
    page = make_page(Studio(pipe, options.model, limits))
    here = ("system-ui", "sans-serif")  # gradio's own fonts come from Google's servers
    page.launch(
        server_name=options.host,
        server_port=options.port,
        auth=tuple(options.auth.split(":", 1)) if options.auth else None,
        theme=gr.themes.Default(font=here, font_mono=("ui-monospace", "monospace")),
        max_file_size="1gb",
        prevent_thread_lock=True,
        share=False,
        ssr_mode=False,
        footer_links=["api"],
        quiet=True,
    )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too where a shell started this with it ignored
        signal.signal(number, lambda *_: ended.set())
    print(f"listening on http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
    ended.wait()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it at once
    page.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
