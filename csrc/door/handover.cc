#include "door/handover.h"

#include <utility>

namespace twinjet::door {
namespace {

bool IsLarge(const Event& event) {
  return event.kind == EventKind::kMessage && event.bytes.size() > kLargeBytes;
}

}  // namespace

bool Handover::Put(std::vector<Event>& events) {
  const std::lock_guard lock(mutex_);
  const bool was_empty = waiting_.empty() && refused_.empty();
  for (Event& event : events) {
    // A count, because nothing else bounds how many come while the taker is busy.
    if (event.kind == EventKind::kRefused) {
      ++refused_[event.bytes];
    } else {
      waiting_.push_back(std::move(event));
    }
  }
  return was_empty;
}

bool Handover::Take(Turn* turn) {
  turn->events.clear();
  turn->refused.clear();
  {
    const std::lock_guard lock(mutex_);
    arrived_.swap(waiting_);
    turn->refused.swap(refused_);
  }
  for (Event& event : arrived_) Sort(event);
  arrived_.clear();
  size_t num_bytes = 0;
  while (!short_.empty() && turn->events.size() < kEventsATurn && num_bytes < kBytesATurn) {
    num_bytes += short_.front().bytes.size();
    turn->events.push_back(std::move(short_.front()));
    short_.pop_front();
  }
  if (!order_.empty()) TakeLarge(&turn->events);
  return !short_.empty() || !order_.empty();
}

void Handover::Sort(Event& event) {
  const uint64_t id = event.call->id();
  if (!IsLarge(event) && (num_aside_.empty() || !num_aside_.contains(id))) {
    short_.push_back(std::move(event));
    return;
  }
  ++num_aside_[id];
  const void* connection = event.call->connection();
  std::deque<Event>& queue = aside_[connection];
  if (queue.empty()) order_.push_back(connection);
  queue.push_back(std::move(event));
}

void Handover::TakeLarge(std::vector<Event>* events) {
  const void* connection = order_.front();
  order_.pop_front();
  const auto found = aside_.find(connection);
  std::deque<Event>& queue = found->second;
  size_t num_large = 0;
  for (size_t i = 0; i < kEventsATurn && !queue.empty(); ++i) {
    if (IsLarge(queue.front()) && num_large++ > 0) break;
    const auto num_left = num_aside_.find(queue.front().call->id());
    if (--num_left->second == 0) num_aside_.erase(num_left);
    events->push_back(std::move(queue.front()));
    queue.pop_front();
  }
  if (queue.empty()) {
    aside_.erase(found);
  } else {
    order_.push_back(connection);
  }
}

}  // namespace twinjet::door
