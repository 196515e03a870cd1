// What happened at a door, from its threads to the one that deals with it, a turn at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "door/call.h"
#include "door/options.h"

namespace twinjet::door {

// Each call's events stay in order. Connections take turns, so that one's flood of calls holds up no other's.
// Messages above kLargeBytes, which take long to deal with, stand aside with what follows of their calls, and
// connections take turns at them, too: neither a short call nor another connection's large one waits for all
// of those that came before it.
class Handover {
 public:
  // Of one turn, which holds up whatever else its thread does: some hundred short calls, 5 to 10 ms, and one
  // large message.
  static constexpr size_t kEventsATurn = 256;
  static constexpr size_t kBytesATurn = 1 << 20;  // the last message may exceed it
  static constexpr size_t kEventsAVisit = 8;      // of one connection, before the next one's

  struct Turn {
    std::list<Event> events;
    std::map<std::string, int64_t> refused;  // calls of kRefused by path
  };

  // Any thread; moves from the events. Whether the taker must be woken.
  bool Put(std::vector<Event>& events);

  // The taking thread: fills *turn anew. Whether there is more for another turn.
  bool Take(Turn* turn);

 private:
  struct Line {
    std::list<Event> next;
    std::list<Event> aside;
  };
  using Lines = std::unordered_map<const void*, Line>;

  void Sort(std::list<Event>* arrived);
  void TakeNext(std::list<Event>* events, size_t* num_bytes);
  void TakeLarge(std::list<Event>* events);
  // Of the first in an order, whose events of that kind are in queue.
  void EndVisit(Lines::iterator line, const std::list<Event>& queue, std::list<const void*>* order);

  std::mutex mutex_;
  // Guarded by mutex_.
  std::list<Event> waiting_;
  std::map<std::string, int64_t> refused_;
  // The taking thread's.
  Lines lines_;                                      // by connection; none is empty
  std::list<const void*> next_order_, large_order_;  // of those that have such events
  std::unordered_map<uint64_t, size_t> num_aside_;   // by call
};

}  // namespace twinjet::door
