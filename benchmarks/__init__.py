"""Programs that measure; run them as `python -m benchmarks.layer` and so on."""
