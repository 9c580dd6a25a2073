-- call: the call of `sync` as read from ARGV, and what it finds in Redis. Part of sync.lua.

local me = ARGV[1]
local call = {
  seq = tonumber(ARGV[3]), held = tonumber(ARGV[4]), permits = tonumber(ARGV[5]), jobs = tonumber(ARGV[6]),
  birth = tonumber(ARGV[7]), started = tonumber(ARGV[8]), limits = ARGV[9], override = ARGV[10],
  successes = tonumber(ARGV[11]), counted_under = tonumber(ARGV[12]), refused = tonumber(ARGV[13]),
  pause = tonumber(ARGV[14]), returned = ARGV[15], leave = ARGV[16] == '1', reset = ARGV[17] == '1',
  stand = ARGV[18] == '1', last_grant = tonumber(ARGV[19]), flows = {},
}
local flow_count = tonumber(ARGV[20])
for i = 1, flow_count do call.flows[i] = ARGV[20 + i] end
local FIRST_ENTRY = 21 + flow_count

local state, record = load(me)
local now = clock(state)
-- What this call finds and decides: limits in force, places free, who is told. With other gates of the
-- same call (together.lua): permits given by all of them, whether more are waited for here, and for how
-- many us a place is kept free for them. `kept`: places kept free, not to be given in this call.
local gate = { several = false, together = 0, stands = false, keep_us = 0, kept = 0, refusals = 0 }
local returned_flows = {} -- flows some of whose jobs came back to the queue in this call
local delayed = {} -- flow -> earliest due time of the runs refused in this call

local function chunks(list, size, act)
  for from = 1, #list, size do
    act(unpack(list, from, math.min(from + size - 1, #list)))
  end
end

local function expire(key) redis.call('PEXPIRE', key, lifetime_ms(state)) end
