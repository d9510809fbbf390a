"""The NBD protocol: a sans-IO server codec, and a small synchronous client.

`wire` (constants, structs, errnos) <- `limits`, `export` (what an export is, what was agreed on)
<- `handshake` (option haggling), `transmission` (requests in, replies out), `validate` (every rule
a request must obey). None of these knows a socket, an event loop or a clock. `client` is the only
module here that opens a socket; `uri` parses and writes NBD URIs.

Nothing is imported here, so that a process loads only what it uses.

Source of every rule: `doc/proto.md` of https://github.com/NetworkBlockDevice/nbd, cited by section.
"""
