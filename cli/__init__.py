"""The `propolis-cli` command; installed as the package `propolis_cli`."""
