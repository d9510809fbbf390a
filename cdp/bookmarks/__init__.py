"""Application-consistent bookmarks: freeze, hooks, guest agent."""
