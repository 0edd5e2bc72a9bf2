"""Every touch of transformers' private parts, each with its contract test.

`auto` and `adapters` load; `pretrained` saves; `trainer` resumes; `checkpointing` recomputes. Each replacement goes
through `patching.Registry`, so `hf_lora.unregister()` gives back the very objects that stood there.
"""
