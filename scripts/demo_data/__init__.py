"""The parts of scripts/make_demo_data.py: values, phrasings, and how a request is put together."""
