// What happened at a door, from its threads to the one that deals with it, a turn at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "door/call.h"
#include "door/options.h"

namespace twinjet::door {

// Each call's events stay in order. Messages above kLargeBytes, which take long to deal with, stand aside
// with what follows of their calls, and connections take turns at them: neither a short call nor another
// connection's large one waits for all of those that came before it.
class Handover {
 public:
  // Of one turn, which holds up whatever else its thread does: some hundred short calls, 5 to 10 ms, and one
  // large message. A message may exceed kBytesATurn.
  static constexpr size_t kEventsATurn = 256;
  static constexpr size_t kBytesATurn = 1 << 20;

  struct Turn {
    std::vector<Event> events;
    std::map<std::string, int64_t> refused;  // calls of kRefused by path
  };

  // Any thread; moves from the events. Whether the taker must be woken.
  bool Put(std::vector<Event>& events);

  // The taking thread: fills *turn anew. Whether there is more for another turn.
  bool Take(Turn* turn);

 private:
  void Sort(Event& event);
  void TakeLarge(std::vector<Event>* events);

  std::mutex mutex_;
  // Guarded by mutex_.
  std::vector<Event> waiting_;
  std::map<std::string, int64_t> refused_;
  // The taking thread's.
  std::vector<Event> arrived_;  // empty between turns; kept for its memory
  std::deque<Event> short_;
  std::unordered_map<const void*, std::deque<Event>> aside_;  // by connection; none is empty
  std::deque<const void*> order_;                             // of aside_
  std::unordered_map<uint64_t, size_t> num_aside_;            // by call
};

}  // namespace twinjet::door
