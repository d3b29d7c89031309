"""Run your own LLMs on your own GPU machines."""
