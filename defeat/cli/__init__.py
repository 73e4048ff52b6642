"""The `defeat` command's subcommands, one file for each kind of resource."""
