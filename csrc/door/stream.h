// What a connection keeps of each of its calls, and what the connections of one loop share. Not for other
// threads.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "door/call.h"
#include "door/mailbox.h"
#include "door/message_reader.h"
#include "door/options.h"
#include "door/outbox.h"
#include "door/request_head.h"

namespace twinjet::door {

class Session;

// A call as its connection has it, from its first header to the end of its HTTP/2 stream.
struct Stream {
  Stream(Session* owner, int32_t stream_id, size_t max_metadata_bytes)
      : session(owner), id(stream_id), head(std::make_unique<RequestHead>(max_metadata_bytes)) {}

  Session* const session;
  const int32_t id;
  CallRef call;  // null until the request's headers are found good
  // Of a bounded path, until its first message is whole: who does not ask takes no place.
  std::unique_ptr<CallInfo> untold;
  std::unique_ptr<Place> place;       // until the status is set, if the path is bounded
  std::unique_ptr<RequestHead> head;  // until its block has ended
  size_t metadata_bytes = 0;          // of all its header blocks

  MessageReader reader;
  size_t buffered_bytes = 0;  // of reader, as counted in Totals
  size_t withheld_bytes = 0;  // of flow-control window that the client gets back once messages are taken
  int num_unacknowledged = 0;
  bool has_message = false;  // one has come whole
  int64_t read_at_ns = 0;

  Outbox out;
  int64_t moved_at_ns = 0;  // when bytes last left out, or the call was finished
  Status status;
  bool is_compressing = false;
  bool are_headers_sent = false;
  bool is_finished = false;    // status is set
  bool is_discarding = false;  // what the client still sends is of no use
  bool is_request_ended = false;
  bool is_handler_told = false;  // of the end
  int64_t deadline_ns = -1;
  int64_t timer_at_ns = -1;
};

// When something must be done about a stream: its deadline, or the end of patience with it.
struct Timer {
  int64_t at_ns;
  Stream* stream;
  friend auto operator<=>(const Timer&, const Timer&) = default;
};

// What the sessions of one loop share.
struct LoopState {
  const Options* options;
  std::shared_ptr<Totals> totals;
  std::shared_ptr<Mailbox> mailbox;
  int64_t now_ns = 0;         // steady clock, as of this turn of the loop
  std::vector<Event> events;  // to be delivered at the end of the turn
  std::set<Timer> timers;
};

}  // namespace twinjet::door
