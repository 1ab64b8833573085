"""
The morning in one page: run analysis.ipynb and write morning.html, a single file for a browser.

    uv run morning.py [results.tsv]         # or nights/nov24/results.tsv, a night on record
"""

import argparse
import os
import sys
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor
from traitlets.config import Config

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("results", nargs="?", default="results.tsv")
os.environ["RESULTS"] = parser.parse_args().results
if not Path(os.environ["RESULTS"]).is_file():
    sys.exit(f"there is no {os.environ['RESULTS']}; an agent that follows program.md writes it")
if hasattr(os, "nice"):
    os.nice(19)                         # a run that is going comes first
notebook = nbformat.read("analysis.ipynb", as_version=4)
try:
    quiet = ["--log-level=ERROR"]       # the kernel warns that its port is not encrypted
    ExecutePreprocessor(timeout=600, extra_arguments=quiet).preprocess(notebook)
except CellExecutionError as error:
    sys.exit(f"analysis.ipynb stopped: {error.ename}: {error.evalue}")
except (CellTimeoutError, DeadKernelError) as error:
    sys.exit(f"analysis.ipynb stopped: {str(error).strip().splitlines()[0]}")
# No script from elsewhere: the page is read where there is no network too.
urls = ("mathjax_url", "require_js_url", "jquery_url", "mermaid_js_url")
config = Config(
    TemplateExporter={"exclude_input": True, "exclude_output_prompt": True},
    HTMLExporter=dict.fromkeys(urls, "") | {"embed_images": True})
title = {"metadata": {"name": "The morning after"}}
page, _ = HTMLExporter(config=config).from_notebook_node(notebook, title)
Path("morning.html").write_text(page, "utf-8")
print(f"open {Path('morning.html').resolve()} in a browser")
