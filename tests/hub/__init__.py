"""A local hub for tests: a server that the unmodified huggingface_hub client pushes to and pulls from.

    def test_something(hub):
        model.push_to_hub("me/model")
        assert "config.json" in hub.files("me/model")
        hub.faults.cut("*/resolve/*/adapter_model.safetensors", after=100)

`hub.env` holds the environment variables for a child process. See `Hub` in fixture.py and `Faults` in faults.py.
`python -m hub` in this folder's parent serves one by hand.
"""

from .fixture import Hub

__all__ = ["Hub"]
