-- wake: who is told, who stands idle, when to ask again, and what the caller hears. Part of sync.lua.

-- When the next place comes free by itself, us; nil when only a release can free one.
local function next_free()
  if now < gate.closed_until then return gate.closed_until end
  local places = math.floor(state.level) - state.in_use
  if places <= 0 then return nil end
  local due = now
  if gate.rate > 0 and gate.used >= gate.rate then
    due = math.min(tonumber(redis.call('LINDEX', STARTS, gate.used - gate.rate)), PARKED) + state.window
  end
  if gate.paced then due = math.max(due, state.next_start) end
  if gate.kept > 0 and gate.kept >= math.min(places, starts_left()) then due = math.max(due, state.kept_until) end
  return due
end

-- Grant the head what it waits for, in its wake message: it need not ask. Not beyond its fair share, so that
-- one that is frozen gets no more than it might have held anyway. The grant belongs to the head's last call:
-- it is void once the head has made another, whose absolute `held` takes it back (see take_back_unheard).
local function grant_head()
  local head = first_ticket()
  if not head or head == me then return false end
  local record = read_record(redis.call('HGET', GATE, 'p:' .. head))
  if not record or record.kind ~= 'p' then return false end
  local count = math.min(gate.free, record.want, fair_share() - record.held)
  if count <= 0 or #record.pushed > 1000 or redis.call('PUBSUB', 'NUMSUB', channel_of(head))[2] == 0 then return false end
  local stamp = stamp_starts(count)
  state.attempt = state.attempt + count
  state.in_use = state.in_use + count
  gate.free, gate.used = gate.free - count, gate.used + (gate.logs and count or 0)
  record.held, record.want, record.since, state.admitted = record.held + count, record.want - count, now, now
  record.pushed = record.pushed .. string.format('%d:%d:%d,', state.attempt, count, stamp)
  state.peak = math.max(state.peak, state.in_use)
  if record.want > 0 then take_ticket(head) else drop_ticket(head, record) end
  redis.call('HSET', GATE, 'p:' .. head, write_record(record))
  tell(head, string.format('grant %d %d %d %d %d %d', record.seq, count, state.attempt, stamp,
    state.slack, now))
  return true
end

-- Only the head has a timer and only the head is woken; it gets the time at which it is due. One that nobody
-- hears at is gone: it goes to the tail, and the next one is told.
local function wake_head()
  local due = gate.due
  if state.woken == me then state.woken = '' end -- it has called: a later head must be told anew
  for _ = 1, 4 do
    local head = state.waiting > 0 and first_ticket() or nil
    if not head then
      state.woken, state.waiting = '', 0
      return nil
    elseif head == me then
      state.woken, state.woken_due = me, due or now + state.lease
      return head
    elseif not due or (head == state.woken and due >= state.woken_due) then
      return head
    end
    state.woken, state.woken_due = head, due
    if publish(head, math.max(0, due - now)) > 0 or state.waiting == 1 then return head end
    take_ticket(head)
  end
  return first_ticket()
end

-- Idle processes may be left asleep when fewer were woken than jobs came: while nobody waits by ticket,
-- wake one per flow that has both, so that one stands by ticket, with a timer, whenever jobs wait.
local function wake_left_behind()
  state.behind = 0
  for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do
    if redis.call('ZCARD', idle_of(flow)) > 0 then
      local first = redis.call('ZRANGE', queue_of(flow), 0, 0, 'WITHSCORES')
      if first[2] and tonumber(first[2]) < PARKED then
        wake_idle(flow)
        state.behind = 1
      end
    end
  end
end

-- The first idle process of the flow hears when a delayed run is due; it goes on standing idle.
local function tell_idle(flow, due)
  local first = redis.call('ZRANGE', idle_of(flow), 0, 0)[1]
  if first then publish(first, math.max(0, due - now)) end
end

local function stand_idle(idle)
  if idle then
    for _, flow in ipairs(call.flows) do
      if redis.call('ZADD', idle_of(flow), whole(now), me) == 1 then expire(idle_of(flow)) end
    end
  elseif record.idle then
    for _, flow in ipairs(call.flows) do redis.call('ZREM', idle_of(flow), me) end
  end
  record.idle = idle
end

-- Written only when a fifth of it is gone: most calls of a busy process need not touch the lease.
local function extend_lease()
  local ends = now + (gate.stretched and 2 * state.lease or state.lease)
  if record.ends - now < 0.8 * state.lease or record.ends > now + 2 * state.lease or gate.stretched then
    redis.call('ZADD', LEASES, whole(ends), me)
    record.ends = ends
  end
end

-- Everybody whose turn may have come hears of it, and the caller stands where it belongs.
local function wake()
  local was_idle = record.idle
  stand_idle(not call.leave and not gate.more and call.jobs > gate.jobs)
  local most = 16 -- in one call; the head of those left is told to call
  while gate.free > 0 and state.waiting > 0 and most > 0 and grant_head() do most = most - 1 end
  gate.due = next_free()
  gate.head = wake_head()
  if gate.free > 0 and not gate.head and gate.more then returned_flows[gate.more] = true end
  for flow in pairs(returned_flows) do
    if wake_idle(flow) > 0 then state.behind = 1 end
  end
  if not gate.head and state.behind == 1 and next(returned_flows) == nil then wake_left_behind() end
  if record.idle then return end
  if was_idle and state.due > 0 then
    for _, flow in ipairs(call.flows) do tell_idle(flow, state.due) end
  end
  for flow, at in pairs(delayed) do tell_idle(flow, at) end
end

-- answer ----------------------------------------------------------------------------------------

local function reason()
  if gate.refuses then
    if now < gate.opens then return 'cold' end
    if now < gate.closed_until then return 'pause' end
    if math.floor(state.level) - state.in_use <= 0 then return 'level' end
    if gate.rate > 0 and gate.used >= gate.rate then return 'window' end
    if gate.paced and now < state.next_start then return 'pacing' end
    return 'turn'
  end
  if gate.unknown then return 'cold' end
  return call.jobs > gate.jobs and 'jobs' or '-'
end

-- When to call again though nothing happened, us. Above 100 waiting processes a lease is stretched.
local function wait_us()
  local mine = gate.head == me
  gate.stretched = state.waiting > 100 and record.held == 0 and gate.refuses and not mine
  local wait = gate.stretched and state.lease or state.lease / 3
  if gate.gone > 0 and gate.more then return 0 end -- some were lost: ask again for what is left
  if state.reap_at >= now and (gate.refuses or record.idle) then wait = math.min(wait, state.reap_at - now + 1000) end
  if gate.refuses and mine and gate.due then wait = math.min(wait, gate.due - now) end
  if gate.refuses and not mine and gate.free > 0 then wait = math.min(wait, GRACE) end
  if gate.refuses and not mine and now < gate.closed_until then -- its head may be gone by then
    wait = math.min(wait, gate.closed_until - now + GRACE)
  end
  if record.idle and state.due > 0 then wait = math.min(wait, state.due - now) end
  return math.max(0, math.ceil(wait))
end

local function leave()
  drop_ticket(me, record)
  stand_idle(false)
  state.in_use = math.max(0, state.in_use - record.held)
  redis.call('ZREM', LEASES, me)
  redis.call('HDEL', GATE, 'p:' .. me, 'a:' .. me)
end

local function header()
  local wait, why = wait_us(), reason()
  if not call.leave then extend_lease() end
  return string.format('%d %d %d %d %d %d %d %s %d %d %d %d %d %s %d %d %d',
    gate.unknown and 1 or 0, gate.permits, wait, now, state.gen, call.started, state.cut, exact(state.level),
    state.in_use, gate.used, gate.stamp, state.slack, record.ends - now, why, gate.permit_attempt,
    gate.together, gate.stands and 1 or 0) .. (gate.note and ' !' .. string.gsub(gate.note, ' ', ',') or '')
end

local function with_jobs(head, refused, claimed)
  claimed[1], claimed[2], claimed[3] = head, state.override, refused
  return claimed
end

-- Write the state, keep the answer in case it has to be given again, and give it.
local function reply()
  if now - state.sampled >= SAMPLE_EVERY then trail().sample() end
  local renew = lifetimes_are_due(state, now)
  local head, refused = header(), table.concat(gate.refused, ' ')
  if call.leave then
    leave()
    save(state)
  else
    record.seq = call.seq
    state.active = state.active + is_active(record)
    local ids = {}
    for i = 4, #gate.claimed, WIDTH do ids[#ids + 1] = gate.claimed[i] end
    local stored = head .. '\n' .. refused .. '\n' .. table.concat(ids, ' ')
    save(state, { 'p:' .. me, write_record(record), 'a:' .. me, stored })
  end
  if renew then renew_lifetimes(state) end
  return with_jobs(head, refused, gate.claimed)
end

-- The same number gets the same answer: header and ids as stored, payloads and records read again.
local function answer_again()
  record.extended = false
  record.ends = math.max(record.ends, now + state.lease) -- it was told that much
  redis.call('ZADD', LEASES, whole(record.ends), me)
  save(state, { 'p:' .. me, write_record(record) })
  local stored = redis.call('HGET', GATE, 'a:' .. me) or ''
  local head, refused, ids = string.match(stored, '^([^\n]*)\n([^\n]*)\n([^\n]*)$')
  local claimed = { '', '', '' }
  for id in string.gmatch(ids or '', '%S+') do
    local job, payload = read_job(redis.call('HGET', JOBS, id)), redis.call('GET', 'arq:job:' .. id)
    if job and payload then claiming().add(claimed, id, job, payload) end
  end
  return with_jobs(head, refused, claimed)
end
