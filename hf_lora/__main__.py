"""`python -m hf_lora` is the command `hf-lora`."""

from .cli import main

if __name__ == "__main__":
    main()
