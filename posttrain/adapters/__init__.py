"""Adapters: schemes that are plain LoRA on disk, and reading a saved one onto its base model."""

# beside adapter_config.json, which is a plain LoRA's: the scheme's settings
SIDE_FILE = "posttrain_adapter.json"
