"""Tests of gptcli.data: tasks."""
