"""`gpt serve`: one model for many clients, by OpenAI's HTTP interface."""
