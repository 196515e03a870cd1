// The door's limits. Times in seconds, sizes in bytes; 0 switches a time off where that is said.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace twinjet::door {

// Of a request: above it, it stands behind shorter ones.
inline constexpr size_t kLargeBytes = 64 << 10;

// A status that the door itself gives.
struct OwnStatus {
  std::string message;
  std::string details;  // a google.rpc.Status to send as grpc-status-details-bin; empty: none
};

struct Options {
  int num_threads = 1;
  size_t max_message_bytes = 16 << 20;   // of one request message, after decompression
  size_t max_metadata_bytes = 16 << 10;  // of one header block, counted as HTTP/2 does: 32 more a field
  uint32_t max_streams = 4096;           // open at once on one connection
  size_t max_connections = 16384;
  size_t max_address_connections = 0;  // open from one IP address; 0: no limit
  int client_ipv6_prefix = 64;         // bits, 1 to 128, of what is one address of IPv6
  size_t max_calls = 65536;            // that handlers have not let go of, over all connections
  // Request bytes that no handler has taken yet. Calls that hold more than kLargeBytes leave a ninth of it to
  // the others, and one client leaves a ninth of that to other clients.
  size_t max_received_bytes = size_t{512} << 20;
  size_t max_unsent_bytes = size_t{64} << 20;  // of one stream; more ends it
  size_t write_ahead_bytes = 16 << 10;         // of one stream; a writer that asks waits above it
  uint32_t stream_window_bytes = 256 << 10;    // that a client may send ahead on one stream
  int32_t connection_window_bytes = 4 << 20;   // and on one connection
  double handshake_s = 20;           // from accept to the client's first SETTINGS frame, TLS included
  double header_s = 10;              // from the first to the last frame of a header block
  double message_stall_s = 30;       // without a byte in the middle of a request message
  double linger_s = 30;              // for an ended call's last bytes to be read by the client
  double idle_s = 1800;              // without a call before a connection is closed; 0: never
  double keepalive_s = 60;           // silence before we ping; 0: never
  double keepalive_timeout_s = 20;   // without an answer before the connection is closed
  double client_ping_s = 10;         // least time between a client's pings
  uint64_t reset_burst = 4096;       // streams that a client may reset at once
  uint64_t reset_rate = 1000;        // and a second after that
  uint64_t idle_frame_burst = 1000;  // frames that carry nothing, at once
  uint64_t idle_frame_rate = 100;    // and a second after that
  OwnStatus overload{"the server has more to do than it can bear", ""};  // RESOURCE_EXHAUSTED
  OwnStatus deadline{"the deadline has passed", ""};                     // DEADLINE_EXCEEDED
  // Calls of these paths, over all connections, from their first message to their status. One more than
  // max_open gets the status `full` before any handler hears of it.
  std::vector<std::string> bounded_paths;
  size_t max_open = 0;                                                // 0: no limit
  OwnStatus full{"the server has as many calls open as it may", ""};  // RESOURCE_EXHAUSTED
};

}  // namespace twinjet::door
