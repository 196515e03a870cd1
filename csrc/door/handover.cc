#include "door/handover.h"

#include <utility>

namespace twinjet::door {
namespace {

bool IsLarge(const Event& event) {
  return event.kind == EventKind::kMessage && event.bytes.size() > kLargeBytes;
}

// Moves the first entry of one list to the end of another, or of the same.
template <typename T>
void MoveFirst(std::list<T>* from, std::list<T>* to) {
  to->splice(to->end(), *from, from->begin());
}

}  // namespace

bool Handover::Put(std::vector<Event>& events) {
  std::list<Event> added;
  std::vector<std::string> refused;
  for (Event& event : events) {
    if (event.kind == EventKind::kRefused) {
      refused.push_back(std::move(event.bytes));
    } else {
      added.push_back(std::move(event));
    }
  }
  const std::lock_guard lock(mutex_);
  const bool was_empty = waiting_.empty() && refused_.empty();
  waiting_.splice(waiting_.end(), added);
  // A count, because nothing else bounds how many come while the taker is busy.
  for (std::string& path : refused) ++refused_[std::move(path)];
  return was_empty;
}

bool Handover::Take(Turn* turn) {
  turn->events.clear();
  turn->refused.clear();
  std::list<Event> arrived;
  {
    const std::lock_guard lock(mutex_);
    arrived.swap(waiting_);
    turn->refused.swap(refused_);
  }
  Sort(&arrived);
  size_t num_bytes = 0;
  while (!next_order_.empty() && turn->events.size() < kEventsATurn && num_bytes < kBytesATurn) {
    TakeNext(&turn->events, &num_bytes);
  }
  if (!large_order_.empty()) TakeLarge(&turn->events);
  return !lines_.empty();
}

void Handover::Sort(std::list<Event>* arrived) {
  while (!arrived->empty()) {
    const Event& event = arrived->front();
    const void* connection = event.call->connection();
    Line& line = lines_[connection];
    const bool is_aside = IsLarge(event) || (!line.aside.empty() && num_aside_.contains(event.call->id()));
    if (is_aside) ++num_aside_[event.call->id()];
    std::list<Event>& queue = is_aside ? line.aside : line.next;
    if (queue.empty()) (is_aside ? large_order_ : next_order_).push_back(connection);
    MoveFirst(arrived, &queue);
  }
}

void Handover::TakeNext(std::list<Event>* events, size_t* num_bytes) {
  const auto line = lines_.find(next_order_.front());
  std::list<Event>& queue = line->second.next;
  for (size_t i = 0; i < kEventsAVisit && !queue.empty(); ++i) {
    if (events->size() == kEventsATurn || *num_bytes >= kBytesATurn) break;
    *num_bytes += queue.front().bytes.size();
    MoveFirst(&queue, events);
  }
  EndVisit(line, queue, &next_order_);
}

void Handover::TakeLarge(std::list<Event>* events) {
  const auto line = lines_.find(large_order_.front());
  std::list<Event>& queue = line->second.aside;
  size_t num_large = 0;
  for (size_t i = 0; i < kEventsATurn && !queue.empty(); ++i) {
    if (IsLarge(queue.front()) && num_large++ > 0) break;
    const auto num_left = num_aside_.find(queue.front().call->id());
    if (--num_left->second == 0) num_aside_.erase(num_left);
    MoveFirst(&queue, events);
  }
  EndVisit(line, queue, &large_order_);
}

void Handover::EndVisit(Lines::iterator line, const std::list<Event>& queue, std::list<const void*>* order) {
  if (!queue.empty()) return MoveFirst(order, order);
  order->pop_front();
  if (line->second.next.empty() && line->second.aside.empty()) lines_.erase(line);
}

}  // namespace twinjet::door
