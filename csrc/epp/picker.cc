#include "epp/picker.h"

#include <algorithm>
#include <cmath>

namespace twinjet::epp {

ReplicaId Picker::Add() {
  ReplicaId id;
  if (free_.empty()) {
    id = static_cast<ReplicaId>(replicas_.size());
    replicas_.emplace_back();
  } else {
    id = free_.back();
    free_.pop_back();
  }
  replicas_[id].is_used = true;
  ++num_used_;
  return id;
}

void Picker::Remove(ReplicaId id) {
  replicas_[id] = {};
  free_.push_back(id);
  --num_used_;
}

void Picker::Report(ReplicaId id, const ReplicaLoad& load, double now) {
  Replica& replica = replicas_[id];
  replica.load = load;
  replica.reported_at = now;
  ForgetSent(&replica, now - options_.report_lag_s);
  replica.backlog = load.waiting_tokens + static_cast<double>(replica.sent_tokens);
  replica.backlog_at = now;
}

double Picker::Backlog(const Replica& replica, double now) const {
  return std::max(replica.backlog - options_.prefill_per_s * (now - replica.backlog_at), 0.0);
}

void Picker::ForgetSent(Replica* replica, double before) {
  while (!replica->sent.empty() && replica->sent.front().time < before) {
    Settle(replica, &replica->sent.front());
    replica->sent.pop_front();
  }
}

Choice Picker::Judge(ReplicaId id, int64_t num_tokens, double now) const {
  const Replica& replica = replicas_[id];
  double own = static_cast<double>(std::max<int64_t>(num_tokens - replica.cached, 1));
  Choice choice{.replica = id,
                .cost = own,
                .cached_tokens = replica.cached,
                .waiting = 0,
                .assigned = replica.assigned * std::exp((replica.assigned_at - now) / options_.memory_s),
                .is_full = false};
  if (now - replica.reported_at > options_.report_life_s) {
    // Nothing is known but what we have sent.
    auto flying = static_cast<double>(replica.in_flight);
    choice.cost += static_cast<double>(replica.in_flight_tokens) + flying * options_.running_tokens;
    choice.waiting = flying / 2;
    choice.is_full = choice.waiting >= options_.max_waiting;
    return choice;
  }
  const ReplicaLoad& load = replica.load;
  auto num_sent = static_cast<double>(replica.num_sent);
  double backlog = Backlog(replica, now);
  // What we have sent ourselves is there, whatever the replica says.
  double running = std::max(load.running + num_sent, static_cast<double>(replica.in_flight) - load.waiting);
  choice.cost += backlog + load.waiting * options_.waiting_tokens + running * options_.running_tokens;
  if (replica.kv_tokens > 0) {
    double room = replica.kv_tokens * (1 - load.kv_utilization) - backlog;
    if (own > room) choice.cost += (own - room) * options_.kv_penalty;
  }
  choice.waiting = load.waiting + (load.waiting > 0 ? num_sent : 0);
  choice.is_full = choice.waiting >= options_.max_waiting;
  return choice;
}

void Picker::Rank(std::span<const ReplicaId> candidates, int64_t num_tokens, std::span<const Match> cached,
                  double now, uint64_t random, size_t count, std::vector<Choice>* choices) {
  for (const Match& match : cached) {
    if (Has(match.replica)) {
      Replica& replica = replicas_[match.replica];
      replica.cached = std::max(replica.cached, match.num_blocks);
    }
  }
  choices->clear();
  for (ReplicaId id : candidates) {
    if (Has(id)) choices->push_back(Judge(id, num_tokens, now));
  }
  for (const Match& match : cached) {
    if (Has(match.replica)) replicas_[match.replica].cached = 0;
  }
  auto is_better = [random](const Choice& a, const Choice& b) {
    if (a.is_full != b.is_full) return b.is_full;
    if (a.cost != b.cost) return a.cost < b.cost;
    if (a.assigned != b.assigned) return a.assigned < b.assigned;
    auto scatter = [random](ReplicaId id) { return (id + 1) * (random | 1) * 0x9E3779B97F4A7C15; };
    return scatter(a.replica) < scatter(b.replica);
  };
  count = std::min(count, choices->size());
  std::partial_sort(choices->begin(), choices->begin() + static_cast<std::ptrdiff_t>(count), choices->end(),
                    is_better);
  choices->resize(count);
}

void Picker::Settle(Replica* replica, Sent* sent) {
  if (sent->has_ended) return;
  sent->has_ended = true;
  replica->sent_tokens -= sent->num_tokens;
  --replica->num_sent;
}

uint64_t Picker::Begin(ReplicaId id, int64_t num_tokens, double now) {
  Replica& replica = replicas_[id];
  ForgetSent(&replica, now - std::max(options_.report_life_s, options_.report_lag_s));
  replica.sent.push_back({next_ticket_, now, num_tokens});
  ++replica.num_sent;
  replica.backlog = Backlog(replica, now) + static_cast<double>(num_tokens);
  replica.backlog_at = now;
  replica.assigned = replica.assigned * std::exp((replica.assigned_at - now) / options_.memory_s) +
                     static_cast<double>(num_tokens);
  replica.assigned_at = now;
  replica.sent_tokens += num_tokens;
  ++replica.in_flight;
  replica.in_flight_tokens += num_tokens;
  return next_ticket_++;
}

void Picker::End(ReplicaId id, uint64_t ticket, int64_t num_tokens) {
  Replica& replica = replicas_[id];
  --replica.in_flight;
  replica.in_flight_tokens -= num_tokens;
  auto found = std::lower_bound(replica.sent.begin(), replica.sent.end(), ticket,
                                [](const Sent& sent, uint64_t wanted) { return sent.ticket < wanted; });
  if (found == replica.sent.end() || found->ticket != ticket) return;
  Settle(&replica, &*found);
  replica.backlog = std::max(replica.backlog - static_cast<double>(num_tokens), 0.0);
}

}  // namespace twinjet::epp
