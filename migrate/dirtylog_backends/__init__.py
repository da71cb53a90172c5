"""Where the dirty log's raw dirt comes from (layer 3); `migrate.dirtylog` is the public side."""
